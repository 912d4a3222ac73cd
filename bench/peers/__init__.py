"""tidegate beside other gateways: `make bench-peers`. Each has one core, and all have one upstream."""
