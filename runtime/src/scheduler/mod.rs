//! The scheduler rooms.
