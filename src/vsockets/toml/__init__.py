"""A TOML reader whose errors name file, line and key."""
