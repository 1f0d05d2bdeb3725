//! Who goes before whom.

use crate::request::{RequestId, Urgency};
use std::time::Duration;

/// A place in the order of requests: priority, then those that were preempted, then the deadline, then arrival.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Rank {
    priority: i32,
    /// It was never in the cache. Within one priority the preempted come back before anybody new comes in.
    fresh: bool,
    deadline: Duration,
    id: RequestId,
}

impl Rank {
    /// Of a request that arrives.
    pub(super) fn new(id: RequestId, urgency: Urgency) -> Self {
        let deadline = urgency.deadline.unwrap_or(Duration::MAX);
        Self { priority: urgency.priority, fresh: true, deadline, id }
    }

    /// Of the same request once it has been in the cache.
    pub(super) fn admitted(self) -> Self {
        Self { fresh: false, ..self }
    }

    pub(super) fn id(self) -> RequestId {
        self.id
    }
}
