"""Process groups, the CPU shim, batch distribution and the vocabulary-parallel loss."""
