"""Memory by batch size, and time and memory over a long text."""
