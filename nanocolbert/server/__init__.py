"""The server: its JSON interface, its guard, its worker."""
