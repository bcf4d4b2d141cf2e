"""What training with teachers costs: images per second against a bare loop and torchdistill, the cache, the memory."""
