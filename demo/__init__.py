"""The whole belt on real data: train, export, verify, serve, stream, and show what came out. ``python -m demo``.

Owns nothing that others need; uses every part as its users do. Nothing imports it.
"""
