"""What a run will need before anybody pays for it: memory, operations, time and money."""
