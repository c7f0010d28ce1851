"""What other frameworks plug in; each module needs its framework installed."""
