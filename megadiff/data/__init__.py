"""From text to batches of token ids; this room knows nothing of noise, it hands out clean tokens."""
