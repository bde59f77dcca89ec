"""An attention method, a task and its figure, added to sbeval from outside."""
