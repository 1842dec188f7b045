"""A board of methods: a small record of each run, and what the records say of the methods together."""
