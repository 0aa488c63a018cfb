"""Export to the Hugging Face format: a name table, a converter, and the files that ship with the weights."""
