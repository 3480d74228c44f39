"""Time of a decoding step, time to the first token, and throughput."""
