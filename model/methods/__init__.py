"""Training methods: PPAP, STEGO, HP and the frozen baseline."""
