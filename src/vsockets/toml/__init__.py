"""Reading TOML for people: every mistake names its file, line and key."""
