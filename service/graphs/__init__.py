"""What a graph is, told from its file, and how one is rewritten. Must not know what runs it."""
