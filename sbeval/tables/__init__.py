"""Result tables, and what is read off them; no torch."""
