"""Checks of what is passed in: arguments of users, and what methods of strategies return."""
