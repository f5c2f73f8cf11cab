"""Where the lab's tokens come from: text that is on the machine, and tasks made from a seed."""
