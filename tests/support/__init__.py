"""What several tests share: commands, tiny models, a Hub on loopback."""
