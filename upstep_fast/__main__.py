"""`python -m upstep_fast`, for torchrun."""

from upstep_fast.cli import main

if __name__ == "__main__":
    main()
