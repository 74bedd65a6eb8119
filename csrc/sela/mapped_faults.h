#pragma once

namespace sela {

/// From now on a read of a mapped file that cannot be done ends the process with a line that names the file, and exit
/// status 3; by itself the system ends it in silence (SIGBUS). That is so where another program cuts the file short, or
/// its disk fails, and whichever thread of whichever library reads. What is there for SIGBUS already stays.
///
/// @returns whether the handler is new: then `mapped_faults_end` takes it away again.
bool mapped_faults_begin();

/// SIGBUS does again what it did by itself.
void mapped_faults_end();

}  // namespace sela
