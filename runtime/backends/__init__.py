"""Independent ways to run one exported model, chosen by name or by `auto`."""
