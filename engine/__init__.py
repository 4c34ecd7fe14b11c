"""The queues and the counting: what happens to an event between the HTTP front and storage."""
