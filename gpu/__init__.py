"""What a machine with a GPU runs when it is at hand for minutes: ``make gpu``; and its rehearsal without one."""
