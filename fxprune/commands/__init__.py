"""What the commands do, one module each. Results go to standard output, progress and tables to standard error."""
