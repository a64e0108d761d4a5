# What the hooks of ganeti-instance-image source (`. common.sh`, with bash): its functions and variables, so that a
# site's hooks run unchanged. New hooks need none of it: everything is in their environment (see README.rst).
# shellcheck shell=bash disable=SC2034

AWK=awk
DUMP=dump
KPARTX=kpartx
LOSETUP=losetup
MKDIR_P="mkdir -p"
PARTED=parted
QEMU_IMG=qemu-img
SFDISK=sfdisk
# Commands that print a filesystem's UUID and type: $VOL_ID DEVICE
VOL_ID="blkid -c /dev/null -o value -s UUID"
VOL_TYPE="blkid -c /dev/null -o value -s TYPE"

SCRIPT_NAME=${0##*/}
KERNEL_PATH=${INSTANCE_HV_kernel_path-}
INSTANCE_MEM=${INSTANCE_BE_memory:-${INSTANCE_BE_maxmem-}}
instance=${INSTANCE_NAME-}
old_name=${OLD_INSTANCE_NAME-}
blockdev=${BLOCKDEV-}
root_dev=${ROOT_DEV-}
boot_dev=${BOOT_DEV-}
swap_dev=${SWAP_DEV-}

log_error() {
  echo "$@" >&2
}

# debug COMMAND...: only with IMAGE_DEBUG, as in `debug set -x`
debug() {
  case ${IMAGE_DEBUG-} in
    1 | yes) "$@" ;;
  esac
}

# Commands to run at the end, the last one first: CLEANUP+=("umount /mnt")
CLEANUP=()

cleanup() {
  local i
  for ((i = ${#CLEANUP[@]} - 1; i >= 0; i--)); do
    # unquoted: each element is a whole command line
    ${CLEANUP[i]}
  done
  CLEANUP=()
}
trap cleanup EXIT

# get_os_type ROOT: sets OS_TYPE to redhat, debian, gentoo or suse
get_os_type() {
  _wants_root get_os_type "$@"
  OS_TYPE=
  if [[ -e $1/etc/redhat-release ]]; then
    OS_TYPE=redhat
  elif [[ -e $1/etc/debian_version ]]; then
    OS_TYPE=debian
  elif [[ -e $1/etc/gentoo-release ]]; then
    OS_TYPE=gentoo
  elif [[ -e $1/etc/SuSE-release ]] || [[ $(_os_release "$1" ID_LIKE) == *suse* ]]; then
    OS_TYPE=suse
  fi
}

# get_os ROOT: sets OPERATING_SYSTEM to the distribution's name in lower case: debian, ubuntu, centos, fedora, ...
get_os() {
  _wants_root get_os "$@"
  OPERATING_SYSTEM=$(_os_release "$1" ID)
  [[ $OPERATING_SYSTEM != rhel ]] || OPERATING_SYSTEM=redhat
  if [[ -n $OPERATING_SYSTEM ]]; then
    return
  fi
  get_os_type "$1"
  OPERATING_SYSTEM=$OS_TYPE
  if [[ -e $1/etc/fedora-release ]]; then
    OPERATING_SYSTEM=fedora
  elif [[ $OS_TYPE == redhat ]] && grep -qi centos "$1/etc/redhat-release"; then
    OPERATING_SYSTEM=centos
  fi
}

# get_os_release ROOT: sets OS_RELEASE to the distribution's version
get_os_release() {
  _wants_root get_os_release "$@"
  OS_RELEASE=$(_os_release "$1" VERSION_ID)
  if [[ -z $OS_RELEASE && -f $1/etc/debian_version && ! -L $1/etc/debian_version ]]; then
    OS_RELEASE=$(<"$1/etc/debian_version")
  elif [[ -z $OS_RELEASE && -f $1/etc/redhat-release && ! -L $1/etc/redhat-release ]]; then
    OS_RELEASE=$(sed -n 's/^[^0-9]*\([0-9.]*\).*/\1/p' "$1/etc/redhat-release")
  fi
}

_wants_root() {
  if [[ -z ${2-} ]]; then
    log_error "target is not set in $1"
    exit 1
  fi
}

# _os_release ROOT NAME: a value from the guest's os-release, read as text: a guest's file is never sourced
_os_release() {
  local file
  for file in "$1/etc/os-release" "$1/usr/lib/os-release"; do
    if [[ -f $file && ! -L $file ]]; then
      sed -n "s/^$2=[\"']\{0,1\}\([^\"']*\).*/\1/p" "$file" | head -n 1
      return
    fi
  done
}
