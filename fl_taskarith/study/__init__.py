"""What is made from results: figures and tables."""
