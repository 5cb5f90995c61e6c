"""From model files to versions that serve: found, read, audited, measured, listed. Must not know sessions."""
