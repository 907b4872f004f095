"""What the service answers to a table of requests, recorded, so that a change of the code shows where it changes."""
