"""The serving engine: scheduling, batching, the compiled step, sampling, streams."""
