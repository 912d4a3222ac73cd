"""The contract: messages and services of tidegate, and nothing else."""
