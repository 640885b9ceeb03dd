"""The parts of the methods that PPAP is compared with: STEGO's head and HP's local mixing."""
