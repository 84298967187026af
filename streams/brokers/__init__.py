"""Connections and logins to Redis, Kafka and NATS."""
