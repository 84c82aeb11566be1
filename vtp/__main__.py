"""`python -m vtp` and `torchrun -m vtp`: the same program as the `vtp` command."""

from vtp.cli import main

if __name__ == "__main__":
    main()
