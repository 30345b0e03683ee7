"""What a client answers to each message."""
