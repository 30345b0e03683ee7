"""What one process keeps between messages: data, shards, one model, and what is made from them."""
