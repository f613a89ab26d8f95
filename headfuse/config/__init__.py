"""What a user can set: YAML, command line and Python to frozen options."""
