/*
 * file: opened files and the nameless swap file, see om_file.h.
 *
 * Owns the descriptors of a struct om_file, all close-on-exec. The reference count and `refused`
 * are atomic; om_file_grow belongs to one thread. Every failure names the path.
 */
#include "plat/om_file.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include "base/om_base.h"
#include "base/om_error.h"

static int failed(int error, const char *what, const char *path)
{
	om_err(-error, "cannot %s %s: %s", what, path, om_err_text(-error));
	om_err_file(path);
	return -error;
}

static struct om_file *file_new(const char *path)
{
	struct om_file *f = om_alloc(1, sizeof(*f));

	if (!f)
		return NULL;
	f->fd = f->fd_direct = -1;
	f->align = (uint32_t)OM_PAGE;
	f->refs = 1;
	f->path = om_strdup(path);
	if (!f->path) {
		om_free(f);
		return NULL;
	}
	return f;
}

static void take_id(struct om_file_id *id, const struct stat *st)
{
	id->device = st->st_dev;
	id->inode = st->st_ino;
	id->size = (uint64_t)st->st_size;
	id->mtime_ns = (int64_t)st->st_mtim.tv_sec * (int64_t)OM_NSEC + st->st_mtim.tv_nsec;
}

/* The alignment that O_DIRECT wants on this descriptor, 0 when the file system says it has none;
 * a page where the kernel (before 6.1) or the C library cannot tell. */
static uint32_t direct_align(int fd)
{
#ifdef STATX_DIOALIGN
	struct statx sx;

	if (!statx(fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &sx) && (sx.stx_mask & STATX_DIOALIGN)) {
		uint32_t align = OM_MAX(sx.stx_dio_mem_align, sx.stx_dio_offset_align);

		if (!sx.stx_dio_mem_align || align > OM_PAGE || (align & (align - 1)))
			return 0;
		return OM_MAX(align, 512u);
	}
#else
	(void)fd;
#endif
	return (uint32_t)OM_PAGE;
}

/* A second descriptor of the same file with O_DIRECT. `path` is the way where /proc is not
 * mounted (NULL: no other way). Leaves fd_direct at -1 when the file system refuses. */
static void open_direct(struct om_file *f, int flags, const char *path)
{
	char link[64];
	struct stat st;

	snprintf(link, sizeof(link), "/proc/self/fd/%d", f->fd);
	f->fd_direct = open(link, flags | O_DIRECT | O_CLOEXEC);
	if (f->fd_direct < 0 && errno == ENOENT && path)
		f->fd_direct = open(path, flags | O_DIRECT | O_CLOEXEC | O_NONBLOCK);
	if (f->fd_direct >= 0) {
		f->align = direct_align(f->fd_direct);
		/* The name may lead to another file by now. O_NONBLOCK must not stay: io_uring
		 * honours it on regular files. */
		if (!f->align || fstat(f->fd_direct, &st) || st.st_dev != f->id.device ||
		    st.st_ino != f->id.inode || fcntl(f->fd_direct, F_SETFL, O_DIRECT)) {
			close(f->fd_direct);
			f->fd_direct = -1;
		}
	}
	if (f->fd_direct < 0) {
		f->align = (uint32_t)OM_PAGE;
		om_file_refuse_direct(f);
	}
}

int om_file_open(const char *path, struct om_file **ret)
{
	struct om_file *f = file_new(path);
	struct stat st;
	int code;

	*ret = NULL;
	if (!f)
		return -ENOMEM;
	/* O_NONBLOCK: opening a pipe by mistake must not wait for its writer. */
	do
		f->fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
	while (f->fd < 0 && errno == EINTR);
	if (f->fd < 0 || fstat(f->fd, &st)) {
		code = failed(errno, "open", path);
		goto fail;
	}
	if (!S_ISREG(st.st_mode)) {
		code = om_err(OM_EVALUE, "%s is not a regular file", path);
		om_err_file(path);
		goto fail;
	}
	if (fcntl(f->fd, F_SETFL, 0)) {
		code = failed(errno, "open", path);
		goto fail;
	}
	take_id(&f->id, &st);
	open_direct(f, O_RDONLY, path);
	*ret = f;
	return 0;
fail:
	om_file_unref(f);
	return code;
}

/* mkdir -p with mode 0700; what exists stays as it is. */
static int make_directories(const char *path)
{
	char part[PATH_MAX];
	size_t n = strlen(path);

	if (!n || n >= sizeof(part))
		return n ? -ENAMETOOLONG : -ENOENT;
	memcpy(part, path, n + 1);
	for (char *p = part + 1;; p++) {
		char was = *p;

		if (was && was != '/')
			continue;
		*p = '\0';
		if (mkdir(part, 0700) && errno != EEXIST) {
			struct stat st;
			int error = errno;

			/* A read-only or protected parent that exists says EROFS or EACCES. */
			if (stat(part, &st) || !S_ISDIR(st.st_mode))
				return -error;
		}
		if (!was)
			return 0;
		*p = was;
	}
}

/* Opens a nameless file in `dir`, a fresh private directory; returns the descriptor or -errno. */
static int open_nameless(int dir)
{
	int fd = openat(dir, ".", O_TMPFILE | O_EXCL | O_RDWR | O_CLOEXEC, 0600);

	if (fd >= 0)
		return fd;
	if (errno != EOPNOTSUPP && errno != EISDIR && errno != ENOENT && errno != EINVAL)
		return -errno;
	fd = openat(dir, "swap", O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
	if (fd < 0)
		return -errno;
	if (unlinkat(dir, "swap", 0)) {
		int error = errno;

		close(fd);
		return -error;
	}
	return fd;
}

/* A nameless file below `directory`: the descriptor, or -errno (no error set). */
static int create_below(const char *directory)
{
	char private[PATH_MAX];
	struct stat st;
	int dir, fd, code = make_directories(directory);

	if (code)
		return code;
	if ((size_t)snprintf(private, sizeof(private), "%s/omnimem-XXXXXX", directory) >=
	    sizeof(private))
		return -ENAMETOOLONG;
	if (!mkdtemp(private))
		return -errno;
	/* From here on by descriptor: in a directory that others may write, the name could be theirs
	 * by now. */
	dir = open(private, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
	if (dir < 0) {
		fd = -errno;
	} else {
		if (fstat(dir, &st))
			fd = -errno;
		else if (st.st_uid != geteuid() || (st.st_mode & 077))
			fd = -EPERM;
		else
			fd = open_nameless(dir);
		close(dir);
	}
	rmdir(private);
	return fd;
}

/* The nth default directory, false when there are no more. */
static bool default_directory(unsigned nth, char *ret, size_t size)
{
	const char *cache = getenv("XDG_CACHE_HOME"), *home = getenv("HOME");

	*ret = '\0';
	switch (nth) {
	case 0:
		if (cache && cache[0] == '/')
			snprintf(ret, size, "%s/omnimem", cache);
		return true;
	case 1:
		if (home && home[0] == '/')
			snprintf(ret, size, "%s/.cache/omnimem", home);
		return true;
	case 2:
		snprintf(ret, size, "/var/tmp");
		return true;
	}
	return false;
}

int om_file_create_swap(const char *directory, struct om_file **ret)
{
	char where[PATH_MAX], label[PATH_MAX + 16];
	struct om_file *f;
	struct stat st;
	int fd = -ENOENT;

	*ret = NULL;
	if (directory) {
		snprintf(where, sizeof(where), "%s", directory);
		fd = strlen(directory) < sizeof(where) ? create_below(where) : -ENAMETOOLONG;
	} else {
		for (unsigned i = 0; fd < 0 && default_directory(i, where, sizeof(where)); i++)
			if (where[0])
				fd = create_below(where);
	}
	if (fd < 0)
		return failed(-fd, "create a swap file in", where);
	snprintf(label, sizeof(label), "(swap in %s)", where);
	f = file_new(label);
	if (!f) {
		close(fd);
		return -ENOMEM;
	}
	f->fd = fd;
	f->writable = true;
	if (fstat(fd, &st)) {
		int code = failed(errno, "create a swap file in", where);

		om_file_unref(f);
		return code;
	}
	take_id(&f->id, &st);
	open_direct(f, O_RDWR, NULL);
	*ret = f;
	return 0;
}

static int grow_failed(const struct om_file *f, uint64_t bytes, int error)
{
	int code = error == ENOSPC || error == EDQUOT ? OM_EDISKFULL : -error;

	om_err(code, "cannot grow %s from %" PRIu64 " to %" PRIu64 " bytes: %s", f->path,
	       f->id.size, bytes, om_err_text(-error));
	om_err_file(f->path);
	return code;
}

int om_file_grow(struct om_file *f, uint64_t bytes)
{
	int error;

	if (bytes <= f->id.size)
		return 0;
	if (om_fault(OM_FAULT_NOSPC))
		return grow_failed(f, bytes, ENOSPC);
	if (bytes > INT64_MAX)
		return grow_failed(f, bytes, EFBIG);
	do
		error = fallocate(f->fd, 0, (off_t)f->id.size, (off_t)(bytes - f->id.size)) ? errno
		                                                                            : 0;
	while (error == EINTR);
	if (error == EOPNOTSUPP || error == ENOSYS)
		error = ftruncate(f->fd, (off_t)bytes) ? errno : 0;
	if (error) {
		/* ext4 keeps what it could allocate until then: the rest of the disk. */
		(void)!ftruncate(f->fd, (off_t)f->id.size);
		return grow_failed(f, bytes, error);
	}
	f->id.size = bytes;
	return 0;
}

int om_file_punch(struct om_file *f, uint64_t offset, uint64_t bytes)
{
	int error;

	do
		error = fallocate(f->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)offset,
		                  (off_t)bytes)
		                ? errno
		                : 0;
	while (error == EINTR);
	if (error == EOPNOTSUPP || error == ENOSYS)
		return -EOPNOTSUPP;
	return error ? failed(error, "punch a hole into", f->path) : 0;
}

int om_file_claim(struct om_file *f, uint64_t offset, uint64_t bytes)
{
	int error;

	if (om_fault(OM_FAULT_NOSPC))
		return grow_failed(f, f->id.size, ENOSPC);
	do
		error = fallocate(f->fd, 0, (off_t)offset, (off_t)bytes) ? errno : 0;
	while (error == EINTR);
	return error && error != EOPNOTSUPP && error != ENOSYS ? grow_failed(f, f->id.size, error)
	                                                       : 0;
}

int om_file_free_bytes(struct om_file *f, uint64_t *ret_bytes)
{
	struct statvfs vfs;
	struct rlimit limit;

	if (fstatvfs(f->fd, &vfs))
		return failed(errno, "ask for the free space of", f->path);
	if (om_mul_overflows(vfs.f_bavail, vfs.f_frsize, ret_bytes))
		*ret_bytes = UINT64_MAX;
	if (!getrlimit(RLIMIT_FSIZE, &limit) && limit.rlim_cur != RLIM_INFINITY) {
		uint64_t room = limit.rlim_cur > f->id.size ? limit.rlim_cur - f->id.size : 0;

		*ret_bytes = OM_MIN(*ret_bytes, room);
	}
	return 0;
}

static int changed(const struct om_file *f, const char *what, uint64_t was, uint64_t is)
{
	om_err(OM_ECORRUPT, "%s changed since it was opened: %s was %" PRIu64 ", is %" PRIu64,
	       f->path, what, was, is);
	om_err_file(f->path);
	return OM_ECORRUPT;
}

bool om_file_is_at(const struct om_file *f, const char *path)
{
	struct stat st;

	return stat(path, &st) == 0 && (uint64_t)st.st_dev == f->id.device &&
	       (uint64_t)st.st_ino == f->id.inode && om_file_check(f) == 0;
}

int om_file_check(const struct om_file *f)
{
	struct stat st;
	struct om_file_id now;

	/* A name that is gone changes no byte of the open file; another file under it does matter. */
	if (!f->writable && !stat(f->path, &st)) {
		if (st.st_dev != f->id.device)
			return changed(f, "device", f->id.device, st.st_dev);
		if (st.st_ino != f->id.inode)
			return changed(f, "inode", f->id.inode, st.st_ino);
	}
	if (fstat(f->fd, &st))
		return failed(errno, "check", f->path);
	take_id(&now, &st);
	if (now.size != f->id.size)
		return changed(f, "size", f->id.size, now.size);
	if (!f->writable && now.mtime_ns != f->id.mtime_ns)
		return changed(f, "mtime (ns)", (uint64_t)f->id.mtime_ns, (uint64_t)now.mtime_ns);
	return 0;
}

void om_file_refuse_direct(struct om_file *f)
{
	__atomic_store_n(&f->refused, true, __ATOMIC_RELAXED);
}

void om_file_ref(struct om_file *f)
{
	__atomic_add_fetch(&f->refs, 1, __ATOMIC_RELAXED);
}

void om_file_unref(struct om_file *f)
{
	if (!f || __atomic_sub_fetch(&f->refs, 1, __ATOMIC_ACQ_REL))
		return;
	if (f->fd >= 0)
		close(f->fd);
	if (f->fd_direct >= 0)
		close(f->fd_direct);
	om_free(f->path);
	om_free(f);
}
