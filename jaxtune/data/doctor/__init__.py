"""What is wrong with data before they are trained on: see docs/doctor.md."""
