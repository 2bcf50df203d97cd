"""Where registers, memory and time go."""
