"""Where states live: slots, and the memory behind them, here and on a device. Must not know whose they are."""
