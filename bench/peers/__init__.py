"""tidegate beside other gateways: `make bench-peers`. Each is one process on one core, before one upstream."""
