"""What is measured: `make bench`. Ratios against a direct call in the same run."""
