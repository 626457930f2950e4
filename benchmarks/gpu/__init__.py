"""What only a GPU can show: memory and time of pruning a 7B-shaped model, recovery speed, latency against its ideal."""
