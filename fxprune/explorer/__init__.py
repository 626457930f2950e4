"""The explorer: a model's prune groups, importance and plan as one HTML file that needs no server and no network."""
