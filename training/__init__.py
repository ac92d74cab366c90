"""Training scripts, started with ``accelerate launch training/SCRIPT.py --config FILE``."""
