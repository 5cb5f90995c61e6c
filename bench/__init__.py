"""Throughput and latency, always beside their ceilings and peers. Must not be imported by anything that is served."""
