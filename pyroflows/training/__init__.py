"""How everything here is trained: data, one step, one loop, schedules."""
