"""`python -m upstep_fast`, for torchrun."""

from .cli import main

if __name__ == "__main__":
    main()
