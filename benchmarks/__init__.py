"""What metaopt costs and whether it learns: commands to run from a checkout."""
