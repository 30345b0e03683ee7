"""What carries messages between the server and its clients."""
