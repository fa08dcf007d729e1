"""What people see: the terminal today."""
